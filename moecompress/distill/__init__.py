"""Training a student to predict what a teacher predicts, so that a smaller checkpoint gets quality back."""
