"""What users call: `shield`, its options, its marks and its report."""
