"""What a context-aware tower does: records it, counts it, draws it."""
