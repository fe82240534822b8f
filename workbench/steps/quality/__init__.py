"""What a model answers, and how far a student is from its teacher."""
