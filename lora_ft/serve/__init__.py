"""The server that speaks OpenAI's fine-tuning API on this machine: files, jobs, events, checkpoints, models, answers.

`store` holds what is true, in SQLite; `jobs`, `files` and `models` are the nouns in it. `queue` starts a `worker`, a
process of its own, for each job. `engine` answers with a base and the adapters on it. `app` puts HTTP before all.
"""
