"""What looks at an optimizer's steps, and at which weights of a model are on spheres."""
