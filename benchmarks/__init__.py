"""Questions of speed and cost: one file a question, one table as its answer.

The shared modules: ``timing`` measures, ``figures`` writes and reads, ``network`` makes the models.
"""
