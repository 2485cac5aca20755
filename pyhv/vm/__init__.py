"""A virtual machine: memory, devices and vCPUs, built, started, paused and stopped."""
