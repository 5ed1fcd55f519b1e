"""The gRPC API: services, interceptors and the server that runs them."""
