"""The gateway: conversations, media, and the order of the two stages."""
