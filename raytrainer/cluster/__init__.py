"""Shared clusters: what is sent to one, sending it, and what runs there.

    package    the files that go along                 request    all of a submission, as one value
    submit     from a request to a job and its end     entry      the driver of a job, on the cluster
    ending     how a job ended, and its cause in one line
    api        the Ray Jobs API, on `connection`, with the token of `auth`; `upload` and `follow` are parts of it
    facts      what a cluster can ever run, and what a job waits for; `tables` reads Ray's
    kuberay    a request as a RayJob of Kubernetes     kubectl    Kubernetes by its own client

Nothing is imported here: the driver on the cluster needs no client, a submission no driver.
"""
