"""The built-in backends, a module each: where a run is started. `raytrainer.plugins` has the protocol and the registry.

inline, local, existing     this process is the driver
ray_jobs                    a job of a shared cluster; `jobs_api` has the client of the Ray Jobs API
kuberay                     a RayJob on Kubernetes; `kubernetes` has its documents and kubectl

Importing a module here imports nothing heavy, because each composed config is checked by its backend.
"""
