"""Tests on a whole Airflow. A package, so that its fleet ends with the last of them."""
