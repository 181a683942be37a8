"""Re-sharding of consistent-hash stores: moving keys between shards while clients work."""
