"""What runs a forward pass: graphs, their inputs, K/V cells, products, and where each lies."""
