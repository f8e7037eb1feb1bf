"""What people touch: pictures, panels, exercises and the command line. The only place that imports their libraries."""
