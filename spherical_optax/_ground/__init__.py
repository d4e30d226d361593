"""What all links stand on: groups and sums over them, geometry, selections, leaves."""
