# Airflow with cellferry installed: for the services in docker-compose.yaml.
FROM apache/airflow:3.3.2-python3.11

COPY --chown=airflow:0 requirements.txt pyproject.toml README.md /opt/cellferry/
COPY --chown=airflow:0 include /opt/cellferry/include
RUN pip install --no-cache-dir --requirement /opt/cellferry/requirements.txt \
    && pip install --no-cache-dir --no-deps /opt/cellferry

# The API server writes the passwords that it generates here; a named volume takes over the owner.
RUN mkdir --mode=0770 /opt/airflow/auth

COPY --chown=airflow:0 dags /opt/airflow/dags
COPY --chown=airflow:0 plugins /opt/airflow/plugins
COPY --chown=airflow:0 include/config /opt/airflow/config
