"""What a sweep leaves to look at: tables and plots."""
