"""The verbs: one file each, the public function and its report."""
