"""Other servers for the same models, installed in environments of their own and asked the same questions."""
