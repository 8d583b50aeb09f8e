"""The mathematics of the reward `math`: which answer a response gives, and whether it is the reference."""
