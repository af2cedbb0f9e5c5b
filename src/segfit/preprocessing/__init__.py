"""From raw images to the arrays that networks see."""
