"""What people look at and touch: pictures, panels and exercises. The only place that imports their libraries."""
