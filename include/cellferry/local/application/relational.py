"""What the application does in PostgreSQL. Each function is one operation of one session.

A session changes only rows of its own (and shared counters), so that the ledger says exactly
what each row must look like. Effects name rows by their external_ref; see `checker`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cellferry.local.application.session import Cursor, Result, RowGone, Session

#: A session keeps at most this many rows of a kind, then it only changes and deletes.
KEEP = 40
_ISOLATION = ("read committed",) * 8 + ("repeatable read", "serializable")


@dataclass(slots=True)
class Row:
    """A row of the session's own, as the session last knew it."""

    ref: str
    version: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Ground:
    """Rows that were there before: what new rows hang on. None of their keys ever changes."""

    project: int
    project_ref: str
    users: list[int]
    labels: list[int]
    issues: list[int]
    hot: list[str]


class Relational:
    """The relational half of a session's work."""

    def __init__(self, session: Session, slot: int, slots: int, nonce: int) -> None:
        self._session = session
        self._slot = slot
        self._slots = slots
        self._nonce = nonce
        self._rows: dict[str, list[Row]] = defaultdict(list)
        self._free_slots = list(range(200))
        self._position = 0
        self._views_seen = -1
        self._issues_at_first = 0
        self._ground: Ground | None = None

    @property
    def ground(self) -> Ground:
        """What new rows hang on; looked up once."""
        if self._ground is None:
            self._ground = self._look_around()
            self._rows["issues"] = [
                Row(ref)
                for ref in self._ground.hot
                if zlib.crc32(ref.encode()) % self._slots == self._slot
            ]
            self._issues_at_first = len(self._rows["issues"])
        return self._ground

    def open_issue(self) -> None:
        """An issue, its event and the project's statistics, in one transaction."""
        session, ground, name = self._session, self.ground, self._session.next_id()
        if self._is_full("issues", self._issues_at_first + KEEP):
            self.edit_issue()
            return
        title = f"Issue {name}"
        payload = f"opened {name}"

        def work(cursor: Cursor) -> None:
            cursor.execute(
                "INSERT INTO issues (organization_id, project_id, iid, author_id, title, tags,"
                " custom_fields, external_ref, operation)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    session.organization, ground.project, self._unique(), self._user(), title,
                    ["traffic", name], json.dumps({"by": session.name}), name, name,
                ),
            )  # fmt: skip
            self._event(cursor, name, payload)
            self._view(cursor)

        self._keep(
            session.sql(
                "open_issue",
                name,
                [
                    ["make", "issues", name, digest(title)],
                    ["make", "events", name, digest(payload)],
                    ["add", "page_views", ground.project_ref, 1],
                ],
                work,
                session.random.choice(_ISOLATION),
            ),
            "issues",
            Row(name),
        )

    def edit_issue(self) -> Row | None:
        """Change one issue's title and fields."""
        _ = self.ground
        row = self._any("issues")
        if row is None:
            return None
        session, name = self._session, self._session.next_id()
        title = f"{row.ref} edited by {name}"
        result = session.sql(
            "edit_issue",
            name,
            [["change", "issues", row.ref, digest(title)]],
            _one_row(
                "UPDATE issues SET title = %s, operation = %s, lock_version = lock_version + 1,"
                " state = (ARRAY['opened', 'closed']::issue_state[])[1 + lock_version %% 2],"
                " custom_fields = custom_fields || jsonb_build_object('edits', lock_version)"
                " WHERE external_ref = %s",
                (title, name, row.ref),
            ),
            session.random.choice(_ISOLATION),
        )
        return row if self._changed(result, "issues", row) else None

    def rekey_issue(self) -> None:
        """Give an issue another primary key; its label links follow by cascade."""
        _ = self.ground
        row = self._any("issues")
        if row is None:
            return
        name = self._session.next_id()
        title = f"{row.ref} keyed anew by {name}"
        result = self._session.sql(
            "rekey_issue",
            name,
            [["change", "issues", row.ref, digest(title)]],
            _one_row(
                "UPDATE issues SET id = nextval('issues_id_seq'), title = %s, operation = %s,"
                " lock_version = lock_version + 1 WHERE external_ref = %s",
                (title, name, row.ref),
            ),
        )
        self._changed(result, "issues", row)

    def delete_issue(self) -> None:
        """Delete an issue; its label links go by cascade."""
        _ = self.ground
        row = self._any("issues")
        if row is None or len(self._rows["issues"]) < 4:
            return
        name = self._session.next_id()
        links = [one for one in self._rows["label_links"] if one.facts["issue"] == row.ref]
        result = self._session.sql(
            "delete_issue",
            name,
            [
                ["drop", "issues", row.ref],
                *(["drop", "label_links", link.ref] for link in links),
            ],
            _one_row("DELETE FROM issues WHERE external_ref = %s", (row.ref,)),
        )
        self._dropped(result, "issues", row)
        for link in links:
            self._dropped(result, "label_links", link)

    def replace_issue(self) -> None:
        """Delete an issue and insert another under the same primary key and number."""
        _ = self.ground
        row = self._any("issues")
        if row is None or any(one.facts["issue"] == row.ref for one in self._rows["label_links"]):
            return
        session, name = self._session, self._session.next_id()
        title = f"Issue {name} instead of {row.ref}"

        def work(cursor: Cursor) -> None:
            old = cursor.execute(
                "DELETE FROM issues WHERE external_ref = %s RETURNING id, project_id, iid",
                (row.ref,),
            ).fetchone()
            if old is None:
                raise RowGone(f"issues {row.ref}")
            cursor.execute(
                "INSERT INTO issues (id, organization_id, project_id, iid, author_id, title,"
                " external_ref, operation) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    old[0], session.organization, old[1], old[2], self._user(), title, name, name,
                ),
            )  # fmt: skip

        result = session.sql(
            "replace_issue",
            name,
            [["drop", "issues", row.ref], ["make", "issues", name, digest(title)]],
            work,
        )
        self._dropped(result, "issues", row)
        self._keep(result, "issues", Row(name))

    def add_note(self) -> None:
        """A note; one in five is stored apart from its row."""
        if self._is_full("notes"):
            return self.edit_note()
        session, ground, name = self._session, self.ground, self._session.next_id()
        body = self._body(name)
        result = session.sql(
            "add_note",
            name,
            [["make", "notes", name, digest(body)]],
            _one_row(
                "INSERT INTO notes (project_id, author_id, noteable_type, noteable_id, body,"
                " external_ref, operation) VALUES (%s, %s, 'Issue', %s, %s, %s, %s)",
                (
                    ground.project, self._user(), session.random.choice(ground.issues), body,
                    name, name,
                ),
            ),
        )  # fmt: skip
        self._keep(result, "notes", Row(name))
        return None

    def edit_note(self) -> None:
        """Write a note's text anew, or touch the row without its stored-apart text."""
        row = self._any("notes")
        if row is None:
            return
        session, name = self._session, self._session.next_id()
        if session.random.random() < 0.3 and "body" in row.facts:
            body = row.facts["body"]
            statement = _one_row(
                "UPDATE notes SET operation = %s, lock_version = lock_version + 1"
                " WHERE external_ref = %s",
                (name, row.ref),
            )
        else:
            body = self._body(name)
            statement = _one_row(
                "UPDATE notes SET body = %s, operation = %s, lock_version = lock_version + 1"
                " WHERE external_ref = %s",
                (body, name, row.ref),
            )
        result = session.sql(
            "edit_note", name, [["change", "notes", row.ref, digest(body)]], statement
        )
        if self._changed(result, "notes", row):
            row.facts["body"] = body

    def delete_note(self) -> None:
        """Delete a note."""
        self._delete("notes", "DELETE FROM notes WHERE external_ref = %s")

    def make_label(self) -> None:
        """A label at a position of its own."""
        if self._is_full("labels", 12):
            return self.swap_labels()
        name = self._session.next_id()
        position = self._unique()
        result = self._session.sql(
            "make_label",
            name,
            [["make", "labels", name, digest(f"{name} {position}")]],
            _one_row(
                'INSERT INTO labels (organization_id, title, "position", external_ref, operation)'
                " VALUES (%s, %s, %s, %s, %s)",
                (self._session.organization, name, position, name, name),
            ),
        )
        self._keep(result, "labels", Row(name, facts={"title": name, "position": position}))
        return None

    def swap_labels(self) -> None:
        """Swap titles and positions, both unique, of two labels in one transaction."""
        rows = self._rows["labels"]
        if len(rows) < 2:
            return
        one, two = self._session.random.sample(rows, 2)
        name = self._session.next_id()

        def work(cursor: Cursor) -> None:
            change = (
                'UPDATE labels SET title = %s, "position" = %s, operation = %s,'
                " lock_version = lock_version + %s WHERE external_ref = %s"
            )
            a, b = one.facts, two.facts
            for values in (
                # titles are checked at once, so one steps aside; positions at commit
                (f"aside {name}", a["position"], name, 0, one.ref),
                (a["title"], a["position"], name, 1, two.ref),
                (b["title"], b["position"], name, 1, one.ref),
            ):
                cursor.execute(change, values)
                if cursor.rowcount != 1:
                    raise RowGone(f"labels {values[-1]}")

        result = self._session.sql(
            "swap_labels",
            name,
            [
                ["change", "labels", one.ref, _label(two)],
                ["change", "labels", two.ref, _label(one)],
            ],
            work,
        )
        swapped = [self._changed(result, "labels", row) for row in (one, two)]
        if all(swapped):
            one.facts, two.facts = two.facts, one.facts

    def link_label(self) -> None:
        """Put a label on an issue; a row that only foreign keys tie to its organization."""
        ground = self.ground
        row = self._any("issues")
        if row is None or self._is_full("label_links"):
            return self._delete("label_links", "DELETE FROM label_links WHERE external_ref = %s")
        label = self._session.random.choice(ground.labels)
        if any(
            (one.facts["issue"], one.facts["label"]) == (row.ref, label)
            for one in self._rows["label_links"]
        ):
            return None
        name = self._session.next_id()
        result = self._session.sql(
            "link_label",
            name,
            [["make", "label_links", name, digest(row.ref)]],
            _one_row(
                "INSERT INTO label_links (label_id, issue_id, external_ref, operation)"
                " SELECT %s, id, %s, %s FROM issues WHERE external_ref = %s",
                (label, name, name, row.ref),
            ),
        )
        self._keep(result, "label_links", Row(name, facts={"issue": row.ref, "label": label}))
        return None

    def move_card(self) -> None:
        """Move a card to another slot: its primary key changes, slots are used again."""
        session, name = self._session, self._session.next_id()
        board = f"board {session.name}"
        slot = self._free_slots.pop()
        row = self._any("board_cards")
        content = digest(f"{board}:{slot}")
        if row is None or not self._is_full("board_cards", 6):
            result = session.sql(
                "place_card",
                name,
                [["make", "board_cards", name, content]],
                _one_row(
                    "INSERT INTO board_cards (organization_id, board, slot, title, external_ref,"
                    " operation) VALUES (%s, %s, %s, 'card', %s, %s)",
                    (session.organization, board, slot, name, name),
                ),
            )
            self._keep(result, "board_cards", Row(name, facts={"slot": slot}))
            return
        result = session.sql(
            "move_card",
            name,
            [["change", "board_cards", row.ref, content]],
            _one_row(
                "UPDATE board_cards SET slot = %s, operation = %s,"
                " lock_version = lock_version + 1"
                " WHERE organization_id = %s AND board = %s AND slot = %s",
                (slot, name, session.organization, board, row.facts["slot"]),
            ),
        )
        if self._changed(result, "board_cards", row):
            self._free_slots.append(row.facts["slot"])
            row.facts["slot"] = slot

    def set_preference(self) -> None:
        """Insert or update, whichever it is."""
        session, ground, name = self._session, self.ground, self._session.next_id()
        row = self._any("preferences")
        known = row is not None and self._is_full("preferences", 5)
        ref = row.ref if row is not None and known else name
        user = row.facts["user"] if row is not None and known else self._user()
        result = session.sql(
            "set_preference",
            name,
            [["change" if known else "make", "preferences", ref, digest(name)]],
            _one_row(
                "INSERT INTO preferences AS p (organization_id, user_id, name, value,"
                " external_ref, operation) VALUES (%s, %s, %s, %s, %s, %s)"
                " ON CONFLICT (organization_id, user_id, name) DO UPDATE SET"
                " value = excluded.value, operation = excluded.operation,"
                " lock_version = p.lock_version + 1",
                (session.organization, user, ref, json.dumps({"v": name}), ref, name),
            ),
        )
        del ground
        if row is not None and known:
            self._changed(result, "preferences", row)
        else:
            self._keep(result, "preferences", Row(ref, facts={"user": user}))

    def view_page(self) -> None:
        """Bump a counter that all sessions of the organization share: a hot row."""
        ground = self.ground
        self._session.sql(
            "view_page",
            self._session.next_id(),
            [["add", "page_views", ground.project_ref, 1]],
            self._view,
        )

    def open_merge_request(self) -> None:
        """A merge request with a binary diff; a trigger writes its audit entry."""
        if self._is_full("merge_requests", 15):
            return self.edit_merge_request()
        session, ground, name = self._session, self.ground, self._session.next_id()
        title, diff = f"Merge {name}", (name * 40).encode()

        def work(cursor: Cursor) -> None:
            cursor.execute(
                "WITH made AS (INSERT INTO merge_requests (project_id, iid, author_id, title,"
                " reviewer_ids, external_ref, operation)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING id)"
                " INSERT INTO merge_request_diffs (merge_request_id, relative_order, head_sha,"
                " diff, external_ref, operation) SELECT id, 0, %s, %s, %s, %s FROM made",
                (
                    ground.project, self._unique(), self._user(), title, ground.users[:2], name,
                    name, diff[:20], diff, name, name,
                ),
            )  # fmt: skip

        result = session.sql(
            "open_merge_request",
            name,
            [
                ["make", "merge_requests", name, digest(title)],
                ["make", "merge_request_diffs", name, digest_bytes(diff)],
            ],
            work,
        )
        self._keep(result, "merge_requests", Row(name))
        return None

    def edit_merge_request(self) -> None:
        """Change a merge request's title."""
        row = self._any("merge_requests")
        if row is None:
            return
        name = self._session.next_id()
        title = f"{row.ref} edited by {name}"
        result = self._session.sql(
            "edit_merge_request",
            name,
            [["change", "merge_requests", row.ref, digest(title)]],
            _one_row(
                "UPDATE merge_requests SET title = %s, operation = %s,"
                " lock_version = lock_version + 1 WHERE external_ref = %s",
                (title, name, row.ref),
            ),
        )
        self._changed(result, "merge_requests", row)

    def add_emoji(self) -> None:
        """A row whose only tie to its organization is polymorphic."""
        if self._is_full("award_emoji", 10):
            return self._delete("award_emoji", "DELETE FROM award_emoji WHERE external_ref = %s")
        ground, name = self.ground, self._session.next_id()
        result = self._session.sql(
            "add_emoji",
            name,
            [["make", "award_emoji", name, digest("rocket")]],
            _one_row(
                "INSERT INTO award_emoji (awardable_type, awardable_id, user_id, name,"
                " external_ref, operation) VALUES ('Issue', %s, %s, 'rocket', %s, %s)",
                (self._session.random.choice(ground.issues), self._user(), name, name),
            ),
        )
        self._keep(result, "award_emoji", Row(name))
        return None

    def add_member(self) -> None:
        """A new user and its membership: a referenced row that only this organization has."""
        if self._is_full("users", 8):
            return self.rename_member()
        session, name = self._session, self._session.next_id()

        def work(cursor: Cursor) -> None:
            cursor.execute(
                "WITH made AS (INSERT INTO users (email, name, external_ref, operation)"
                " VALUES (%s, %s, %s, %s) RETURNING id)"
                " INSERT INTO memberships (organization_id, user_id, external_ref, operation)"
                " SELECT %s, id, %s, %s FROM made",
                (f"{name}@traffic.test", name, name, name, session.organization, name, name),
            )

        result = session.sql(
            "add_member",
            name,
            [
                ["make", "users", name, digest(name)],
                ["make", "memberships", name, digest("30")],
            ],
            work,
        )
        self._keep(result, "users", Row(name))
        return None

    def rename_member(self) -> None:
        """Change a user that only this organization has."""
        row = self._any("users")
        if row is None:
            return
        name = self._session.next_id()
        result = self._session.sql(
            "rename_member",
            name,
            [["change", "users", row.ref, digest(name)]],
            _one_row(
                "UPDATE users SET name = %s, operation = %s, lock_version = lock_version + 1"
                " WHERE external_ref = %s",
                (name, name, row.ref),
            ),
        )
        self._changed(result, "users", row)

    def read_back(self) -> None:
        """Read an issue of its own and the shared counter; neither may go backwards."""
        ground = self.ground
        row = self._any("issues")
        if row is None:
            return

        def work(cursor: Cursor) -> list[list[Any]]:
            found = cursor.execute(
                "SELECT (SELECT lock_version FROM issues WHERE external_ref = %s), page_views"
                " FROM project_statistics WHERE project_id = %s",
                (row.ref, ground.project),
            ).fetchone()
            version, views = found or (None, None)
            return [
                ["issues", row.ref, version, row.version],
                ["page_views", ground.project_ref, views, max(self._views_seen, 0)],
            ]

        result = self._session.sql("read_back", self._session.next_id(), (), work)
        if result.ok and result.value[1][2] is not None:
            self._views_seen = max(self._views_seen, result.value[1][2])

    def _look_around(self) -> Ground:
        organization = self._session.organization

        def work(cursor: Cursor) -> Ground:
            def column(query: Any, *values: Any) -> list[Any]:
                return [row[0] for row in cursor.execute(query, values).fetchall()]

            project = cursor.execute(
                "SELECT id, external_ref FROM projects"
                " WHERE organization_id = %s AND external_ref IS NOT NULL",
                (organization,),
            ).fetchone()
            if project is None:
                raise RowGone(f"hot project of organization {organization}")
            return Ground(
                project=project[0],
                project_ref=project[1],
                users=column(
                    "SELECT user_id FROM memberships WHERE organization_id = %s AND user_id > 0"
                    " AND external_ref IS NULL ORDER BY 1 LIMIT 50",
                    organization,
                ),
                labels=column(
                    "SELECT id FROM labels WHERE organization_id = %s AND external_ref IS NULL"
                    " ORDER BY 1 LIMIT 50",
                    organization,
                ),
                issues=column(
                    "SELECT id FROM issues WHERE organization_id = %s AND external_ref IS NULL"
                    " ORDER BY 1 LIMIT 50",
                    organization,
                ),
                hot=column(
                    "SELECT external_ref FROM issues WHERE organization_id = %s"
                    " AND external_ref LIKE 'hot-%%' AND lock_version = 0"
                    # a session of an earlier run may have put a label on it
                    " AND NOT EXISTS (SELECT FROM label_links AS k WHERE k.issue_id = issues.id"
                    " AND k.external_ref IS NOT NULL)",
                    organization,
                ),
            )

        found: list[Ground] = []
        result = self._session.sql(
            "look_around",
            self._session.next_id(),
            (),
            lambda cursor: found.append(work(cursor)),
        )
        if not result.ok:
            raise RowGone(f"organization {organization} cannot be read")
        return found[-1]

    def _delete(self, part: str, statement: Any) -> None:
        row = self._any(part)
        if row is None:
            return
        result = self._session.sql(
            f"delete_{part}",
            self._session.next_id(),
            [["drop", part, row.ref]],
            _one_row(statement, (row.ref,)),
        )
        self._dropped(result, part, row)

    def _event(self, cursor: Cursor, name: str, payload: str) -> None:
        cursor.execute(
            "INSERT INTO events (organization_id, project_id, author_id, action, payload,"
            " external_ref, operation) VALUES (%s, %s, %s, 'opened', %s, %s, %s)",
            (
                self._session.organization, self.ground.project, self._user(),
                json.dumps({"v": payload}), name, name,
            ),
        )  # fmt: skip

    def _view(self, cursor: Cursor) -> None:
        cursor.execute(
            "UPDATE project_statistics SET page_views = page_views + 1 WHERE project_id = %s",
            (self.ground.project,),
        )
        if cursor.rowcount != 1:
            raise RowGone(f"statistics of {self.ground.project_ref}")

    def _user(self) -> int:
        return self._session.random.choice(self.ground.users)

    def _unique(self) -> int:
        """A number that no other session of the organization uses, also of earlier runs."""
        self._position += 1
        return 1_000_000 + (self._nonce * 64 + self._slot) * 100_000 + self._position

    def _body(self, name: str) -> str:
        if self._session.random.random() < 0.2:
            # Hashes do not compress, so that the text is stored apart.
            parts = (hashlib.sha256(f"{name}{one}".encode()).hexdigest() for one in range(80))
            return "".join(parts)
        return f"Note {name} " * 6

    def _any(self, part: str) -> Row | None:
        rows = self._rows[part]
        return self._session.random.choice(rows) if rows else None

    def _is_full(self, part: str, limit: int = KEEP) -> bool:
        return len(self._rows[part]) >= limit

    def _keep(self, result: Result, part: str, row: Row) -> None:
        if result.ok:
            self._rows[part].append(row)

    def _changed(self, result: Result, part: str, row: Row) -> bool:
        if result.ok:
            row.version += 1
        else:
            self._forget(part, row)
        return result.ok

    def _dropped(self, result: Result, part: str, row: Row) -> None:
        del result  # refused or unknown: the session does not touch the row again
        self._forget(part, row)

    def _forget(self, part: str, row: Row) -> None:
        if row in self._rows[part]:
            self._rows[part].remove(row)
        if part == "issues":
            links = self._rows["label_links"]
            links[:] = [one for one in links if one.facts["issue"] != row.ref]


def digest(text: str) -> str:
    """Return how the ledger tells a content."""
    return digest_bytes(text.encode())


def digest_bytes(content: bytes) -> str:
    """Return the digest of bytes, as PostgreSQL's md5 gives it, cut to 12 digits."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()[:12]


def _label(row: Row) -> str:
    return digest(f"{row.facts['title']} {row.facts['position']}")


def _one_row(statement: Any, values: tuple[Any, ...]) -> Callable[[Cursor], None]:
    """Return work that runs one statement, and knows when the row is not there (hazard 8)."""

    def work(cursor: Cursor) -> None:
        cursor.execute(statement, values)
        if cursor.rowcount != 1:
            raise RowGone(f"{cursor.rowcount} rows: {values[-1]}")

    return work
