"""What runs a vCPU. Everything above speaks the protocol of protocol.py; choose.py decides which accelerator it is."""
