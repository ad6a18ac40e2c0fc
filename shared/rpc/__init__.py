"""gRPC plumbing that all services share: serving, channels, the translation of errors, deadlines and request ids."""
