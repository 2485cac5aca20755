"""The per-VM control socket: JSON-RPC 2.0, server and client."""
