"""Shared clusters: what is sent to one, sending it, and what runs there.

    package    the files that go along                 request    all of a submission, as one value
    entry      the driver of a job, on the cluster     kuberay    a request as a RayJob of Kubernetes

Nothing is imported here: the driver on the cluster needs no client, a submission no driver.
"""
