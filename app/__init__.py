"""Serve bundles over HTTP: predictions, and how sure the network is of them.

A request takes one way: ``api`` (HTTP body to typed request) -> ``service`` (queue, steps, answer)
-> ``models``, ``model`` (what is served) -> ``batching`` (which requests share a run, and where it
is made) -> ``runs`` (their rows and passes in one array) -> ``engine`` (onnxruntime) ->
``uncertainty`` (statistics). ``worker`` puts together what one process serves; ``supervisor`` and
``group`` make one service of several. ``score_command`` has files of rows take the same way from
``runs`` on (``parquet`` -> ``scoring`` -> ``parquet``). Nothing here imports torch.

Array shapes are written with these letters:

    B  rows of a request                        T  passes of one row
    C  outputs (classes or targets)             N  row-passes: the sum of T over rows
"""

import os

# onnxruntime reports to its maker unless it is told not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
