"""What users call: `shield`, its options and its marks."""
