"""Shared clusters: build a request, send it, and run it there.

    package    the files that go along                 request    a complete submission, as one value
    submit     from a request to a job and its end     entry      the driver of a job, on the cluster
    ending     how a job ended, and its cause in one line
    api        the Ray Jobs API, over `connection`, with the token from `auth`; it uses `upload` and `follow`
    facts      a cluster's capacity, and what a job waits for; `tables` parses Ray's state tables
    kuberay    a request as a Kubernetes RayJob        kubectl    Kubernetes, through the kubectl client

This package imports nothing here: the driver on the cluster needs no client, and a submission needs no driver.
"""
