"""The network: encoder, codebook, decoder and their layers."""
