//! Reading a row, of either database: what does not parse is an error that names the column, never a panic.

use std::str::{FromStr, from_utf8};

use sqlx::{
    Row, TypeInfo, ValueRef,
    any::{AnyRow, AnyTypeInfoKind},
};

/// A text column. MySQL's keys are VARBINARY, because every collation of both MySQL and MariaDB takes some texts that
/// differ for the same; here they are text again.
pub(super) fn text<'r>(row: &'r AnyRow, column: &str) -> Result<&'r str, sqlx::Error> {
    text_opt(row, column)?.ok_or_else(|| unreadable(column, sqlx::error::UnexpectedNullError))
}

/// Like [`text`], for a column that may be NULL.
pub(super) fn text_opt<'r>(row: &'r AnyRow, column: &str) -> Result<Option<&'r str>, sqlx::Error> {
    let value = row.try_get_raw(column)?;
    if value.is_null() || value.type_info().is_null() {
        return Ok(None);
    }
    match value.type_info().kind() {
        AnyTypeInfoKind::Blob => from_utf8(row.try_get(column)?)
            .map(Some)
            .map_err(|error| unreadable(column, error)),
        _ => row.try_get(column),
    }
}

/// A text column that must parse.
pub(super) fn parsed<T>(row: &AnyRow, column: &str) -> Result<T, sqlx::Error>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    text(row, column)?.parse().map_err(|error| unreadable(column, error))
}

/// Like [`parsed`], for a column that may be NULL.
pub(super) fn parsed_opt<T>(row: &AnyRow, column: &str) -> Result<Option<T>, sqlx::Error>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let text = text_opt(row, column)?;
    text.map(|text| text.parse().map_err(|error| unreadable(column, error)))
        .transpose()
}

pub(super) fn unreadable(
    column: &str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>,
) -> sqlx::Error {
    sqlx::Error::ColumnDecode {
        index: column.into(),
        source: source.into(),
    }
}
