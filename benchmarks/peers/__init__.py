"""What dropserve is compared with: other servers of the same ONNX file.

Each is written as its own documentation advises and runs in a virtual environment of its own,
build/peers/NAME, made from NAME.txt. ``ONNX`` names the file, ``PORT`` the port.
"""
