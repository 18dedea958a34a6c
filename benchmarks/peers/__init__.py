"""The servers that dropserve is compared with, all serving the same ONNX file.

Each follows the advice of its own documentation and runs in its own virtual environment,
build/peers/NAME, installed from NAME.txt. The environment variable ``ONNX`` names the file and
``PORT`` the port.
"""
