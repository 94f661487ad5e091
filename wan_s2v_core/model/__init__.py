"""The networks, written plainly: one device, full precision, no tricks."""
