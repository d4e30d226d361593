"""What the commands share: how they end, their lines, timing, and trainers as processes."""
