"""The parts of train_cifar.py: data, models, recipes, training, report."""
