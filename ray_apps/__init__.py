"""Ray: how labelling, training, embedding and mining spread over a cluster."""
