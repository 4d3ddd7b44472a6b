//! The date for chat templates that call `strftime_now`, in UTC and English, so that a prompt does not depend
//! on where the server stands.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Formats the present in the manner of C's `strftime`; `None` if the format has a directive not known here.
pub(super) fn now(format: &str) -> Option<String> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(format, since_epoch.as_secs())
}

fn strftime(format: &str, unix_seconds: u64) -> Option<String> {
    let days = unix_seconds / 86_400;
    let seconds = unix_seconds % 86_400;
    let (year, month, day) = civil_from_days(days);
    let (month_name, weekday) = (MONTHS[month as usize - 1], WEEKDAYS[(days + 4) as usize % 7]);
    let mut formatted = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            formatted.push(c);
            continue;
        }
        formatted += &match chars.next()? {
            'Y' => format!("{year:04}"),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'B' => month_name.to_owned(),
            'b' => month_name[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => format!("{:02}", seconds / 3600),
            'M' => format!("{:02}", seconds / 60 % 60),
            'S' => format!("{:02}", seconds % 60),
            '%' => "%".to_owned(),
            _ => return None,
        };
    }
    Some(formatted)
}

/// Year, month and day of a day since 1970-01-01 (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_formatted_in_utc() {
        let check = |seconds: u64, expected: &str| {
            assert_eq!(strftime("%a %d %b %Y (%A, %B %m) %H:%M:%S %%", seconds).unwrap(), expected);
        };
        check(0, "Thu 01 Jan 1970 (Thursday, January 01) 00:00:00 %");
        check(951_782_399, "Mon 28 Feb 2000 (Monday, February 02) 23:59:59 %");
        check(951_782_400, "Tue 29 Feb 2000 (Tuesday, February 02) 00:00:00 %");
        check(1_795_478_400, "Tue 24 Nov 2026 (Tuesday, November 11) 00:00:00 %");
        assert_eq!(strftime("%q", 0), None);
        assert_eq!(strftime("%", 0), None);
    }
}
