"""Load tests: a workload that is sent to an OpenAI endpoint, or to an `LLM` in this process, and measured.

`llmengine bench` is the command. `run_load` sends the same requests to any `Target`: `HttpTarget` speaks to an
endpoint, `LibraryTarget` calls an `LLM`; so a server and the library under it are measured by the same clock.
"""
