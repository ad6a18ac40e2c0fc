"""What every service uses: errors, settings, logging, identity, embeddings and their store, gRPC plumbing."""
