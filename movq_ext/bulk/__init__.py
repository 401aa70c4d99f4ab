"""Bulk decoding: the codes of many images, shard by shard."""
