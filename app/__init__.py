"""Serve bundles over HTTP: predictions, and how far they can be trusted.

Imports run one way: ``cli`` -> ``processes`` -> ``server`` -> ``http`` -> ``scoring`` ->
``inference`` -> ``uncertainty`` -> ``bundles``. ``observability``, ``security`` and ``errors`` lie
below all of them. Nothing here imports torch. docs/architecture.md shows the path of a request.
"""
