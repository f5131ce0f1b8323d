"""What runs across a Ray cluster: storage, artifacts, streams, training, k-means actors, tracking."""
