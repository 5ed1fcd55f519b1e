"""The server: one frozen base in memory, many adapters, one continuously batched step loop, gRPC in front."""
