"""The verbs for existing runs and sweeps. They take a run's name, its MLflow id or its Ray submission id.

    handle      RunHandle: what is known of a run, and where to find it
    resolve     from an ID to a run handle
    liveness    whether a run's driver is alive
    reconcile   marking runs whose driver is dead
    summary     what `list` and `status` show of a run; job_summary: of its job
    jobs        shared clusters, as the verbs need them
    recorded    the recorded configs and checkpoints of runs and trials
    verbs       the table of verbs: listing (`list`), status, logs, stop, resume, rerun, evaluate, export, prune
    arguments   the parser of verbs; printing: their messages and JSON
    changes     what a resume may change
    worktree    a git working tree with the code of the original run, for `rerun`

Each module is imported when it is first used, so that listing runs needs neither Ray nor torch.
"""
