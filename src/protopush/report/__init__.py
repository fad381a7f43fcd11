"""What a run can show for itself: its numbers, side by side with other runs', and one page to show around."""
