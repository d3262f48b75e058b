"""Shards to batches: reading, decoding, masks, tokens, positions; and the making of shards (`prepare`)."""
