"""What is minimised: advantages, divergences, the loss of a token, the learning rate. Pure torch."""
