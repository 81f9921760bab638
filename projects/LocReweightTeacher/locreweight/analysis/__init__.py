"""What people look at: boxes drawn over images, and how well they agree with the truth."""
