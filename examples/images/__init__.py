"""The parts of train_cifar.py that are of images: data, networks, recipes, programs, figures."""
