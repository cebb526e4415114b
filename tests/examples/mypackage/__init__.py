"""Methods outside the suite, as a user would write them; the tests train and measure each."""
