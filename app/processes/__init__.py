"""The processes of a service: one worker, or several and their supervisor."""
