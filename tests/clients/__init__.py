"""Programs that speak to the service with the clients of KServe and of MLServer.

Each runs in its own virtual environment, build/clients/NAME, installed from NAME.txt, which `make
lock` writes from NAME.in. It takes the address of the service, and rows as JSON on standard input,
and prints what it got as one JSON object.
"""
